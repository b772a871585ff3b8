"""Foreign formats of passages and embeddings, read as streams that a collection can be built from."""
