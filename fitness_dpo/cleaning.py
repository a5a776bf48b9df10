"""Texts as people left them -> plain text. Imports no torch."""

import html
import re
import unicodedata

UNCLEAN = re.compile(r"[&<\x00-\x09\x0b-\x1f\x7f-\xa0\u2000-\u200f\u2028-\u202f\ud800-\udfff\ufeff]")
HTML_TEXT = re.compile(r"<(p|div|ul|ol|h[1-6]|span)\b[^>]*>.*</(p|div|ul|ol|h[1-6]|span)>\Z", re.DOTALL | re.IGNORECASE)
BLOCK_END = re.compile(r"<br\s*/?>|</(?:p|div|ul|ol|li|h[1-6])>", re.IGNORECASE)
LIST_ITEM = re.compile(r"<li\b[^>]*>\s*", re.IGNORECASE)
TAG = re.compile(r"</?[a-z][^>]*>", re.IGNORECASE)


def standardise(text: str) -> str:
    """The text in Unicode NFC: HTML turned into plain text, Unix line ends, no control characters, no needless white space."""
    text = text.strip()
    spaced = "  " in text or " \n" in text or "\n\n\n" in text
    if not spaced and not UNCLEAN.search(text) and unicodedata.is_normalized("NFC", text):
        return text
    if HTML_TEXT.match(text):
        text = TAG.sub("", LIST_ITEM.sub("- ", BLOCK_END.sub("\n", re.sub(r"\s+", " ", text))))
        text = re.sub(r" *\n *", "\n", text)
    text = unicodedata.normalize("NFC", html.unescape(text))
    text = re.sub(r"\r\n?|[\u2028\u2029\x85]", "\n", text)
    text = re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b\ufeff\ud800-\udfff]", "", text)
    text = re.sub(r"[\xa0\u202f]", " ", text)
    text = re.sub(r"(?<=\S)[ \t]+", " ", text)
    text = re.sub(r" +\n", "\n", text)
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def encodable(text: str) -> str:
    """The text as it is, but for the white space round it and halves of surrogate pairs, which no tokenizer takes."""
    return text.encode(errors="ignore").decode().strip()
