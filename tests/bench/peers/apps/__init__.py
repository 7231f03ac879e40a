"""What runs in the environments of the peers: their tasks, and the program that submits them."""
