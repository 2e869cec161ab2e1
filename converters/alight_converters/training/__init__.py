"""What passes that train have in common: data, teachers, losses and the training loop."""
