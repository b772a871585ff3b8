"""The text that the generator reads: a passage, then the question in the form published checkpoints saw."""

from transformers import PreTrainedTokenizerBase

# transformers 4's `clean_up_tokenization`, in its order: RAG checkpoints were trained on what it returns.
_CLEAN_UP = (
    (" .", "."),
    (" ?", "?"),
    (" !", "!"),
    (" ,", ","),
    (" ' ", "'"),
    (" n't", "n't"),
    (" 'm", "'m"),
    (" 's", "'s"),
    (" 've", "'ve"),
    (" 're", "'re"),
)


def question_form(question: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """The question as the generator knows it: decoded from the question encoder's ids, then cleaned up.

    transformers' retriever receives token ids only and decodes them, so an uncased encoder hands the
    generator a lower-cased question: "How many people live in Paris?" becomes "how many people live in
    paris?". Version 5 dropped the clean-up ("paris ?"), which the checkpoints never saw; it is done here
    whatever the tokenizer's settings.

    Source: `RagRetriever.__call__` of transformers 4 and 5 (`models/rag/retrieval_rag.py`).
    """
    token_ids = tokenizer(question, truncation=True)["input_ids"]
    text: str = tokenizer.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    for spaced, joined in _CLEAN_UP:
        text = text.replace(spaced, joined)
    return text


def context_text(
    title: str, text: str, question: str, *, prefix: str = "", title_sep: str = " / ", doc_sep: str = " // "
) -> str:
    """``prefix + title + title_sep + text + doc_sep + question``, exactly as transformers joins them.

    One leading and one trailing double quote of the title are dropped (DPR's Wikipedia dump quotes its
    titles), and double spaces are collapsed once. `question` is expected in `question_form`.

    Source: `RagRetriever.postprocess_docs` of transformers (`models/rag/retrieval_rag.py`).
    """
    title = title.removeprefix('"').removesuffix('"')
    return f"{prefix}{title}{title_sep}{text}{doc_sep}{question}".replace("  ", " ")
