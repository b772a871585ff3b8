"""A real corpus and a tiny real model, so that the two services can be tried without any download."""
