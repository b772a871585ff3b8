"""The two services put to use: command line, supervisor, client, demo, training."""
