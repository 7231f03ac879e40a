"""What runs in the environments of the peers: tasks with the program that submits them, apps that stream."""
