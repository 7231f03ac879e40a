"""The courier process, between Django's databases on one side, the gateway on the other."""
