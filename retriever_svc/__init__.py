"""The retriever service: passages and embeddings on disk, a faiss index over them, and batches of queries over HTTP."""
