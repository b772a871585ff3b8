"""Embedding of a corpus of passages: by several processes, in bounded memory, resumable after a kill at any moment."""
