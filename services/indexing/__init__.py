"""From a corpus to a collection: passages read, embedded in pieces that survive a kill, and built into an index."""
