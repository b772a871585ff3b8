"""Passages and embeddings in the files of others, as streams that a collection can be built from.

    texts       passages without embeddings, told by the file: delimited (TSV, CSV), jsonl, arrow_files, saved_dataset
    split       documents cut into passages of 100 words
    embedded    with embeddings: RagRetriever's custom data sets, wiki_dpr's tables, and faiss files over their rows
    dpr         with embeddings: the pickles and indexes of the original DPR
    npy         with embeddings: an array beside a file of passages
    unpickle    a pickle's plain data, without running what it names

What is damaged, or would have to be guessed, is refused as ``InvalidRequest`` by file, line or row, and column.
"""
