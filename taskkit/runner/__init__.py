"""The process that runs user code: one attempt at a time, or many asynchronous ones in a shared pool."""
