"""The generator service: question encoder, contexts, RAG heads, and the HTTP front door."""
