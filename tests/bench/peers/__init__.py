"""Other systems, each as its makers recommend it, in an environment of its own."""
