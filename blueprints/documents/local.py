"""What the service knows without asking anybody: an extractive summary, keywords, the language.

Pure functions of the text, the same answer every time. Each is linear in the text, whatever the text is: they run on
user input of any shape. All of it is CPU work: call it in a ``thread_step``, never on the loop.
"""

from __future__ import annotations

import math
import os
import re
import threading
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any, NamedTuple

LANGUAGE_SAMPLE = 20_000  # characters: more tells the model nothing new
SUMMARY_SENTENCES = 3
SUMMARY_LENGTH = 600  # characters
KEYWORDS = 10

_MAX_SENTENCES = 5_000
_MAX_WORDS = 50_000
_MAX_WORD_LENGTH = 40  # what is longer is no word of any language: base64, a URL's tail, one giant token
_UNDETERMINED = "en"  # ISO 639-1 has no code for "cannot be told"

# ---- words ----------------------------------------------------------------------------------------------------------

# Scripts that put no space between words: ideographs and kana. Hangul has spaces.
_UNSPACED = (
    "\u3005\u3007\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff66-\uff9f\U00020000-\U000323af"
)


def _combining_marks() -> str:
    """Return the vowel signs and accents of the basic plane as the inside of a character class.

    ``\\w`` leaves them out, which would cut Hindi, Thai or Arabic words to pieces.
    """
    ranges: list[tuple[int, int]] = []
    for code in range(0x300, 0x10000):
        if unicodedata.category(chr(code)) in ("Mn", "Mc") or code in (0x200C, 0x200D):  # the two joiners belong inside
            if ranges and ranges[-1][1] == code - 1:
                ranges[-1] = (ranges[-1][0], code)
            else:
                ranges.append((code, code))
    return "".join(f"{chr(first)}-{chr(last)}" for first, last in ranges)


_WORD_CHARACTERS = rf"(?:[^\W_{_UNSPACED}]|[{_combining_marks()}])"
# Possessive throughout: no position is ever read twice, so no input makes the scan anything but linear.
_TOKEN = re.compile(rf"(?P<unspaced>[{_UNSPACED}]++)|{_WORD_CHARACTERS}++(?:['’_]{_WORD_CHARACTERS}++)*+")
_UNSPACED_CHARACTER = re.compile(rf"[{_UNSPACED}]")
_UNSPACED_RUN = re.compile(rf"[{_UNSPACED}]+")
_KATAKANA_OR_HAN = re.compile("[\u30a0-\u30ff]{2,}|[\u3005\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]+")


def count_words(text: str) -> int:
    """Count as ``wc -w`` does, and every ideograph or kana as a word of its own, as word processors do."""
    if not _UNSPACED_CHARACTER.search(text):
        return len(text.split())
    characters = len(_UNSPACED_CHARACTER.findall(text))
    # "中文 and 中文": what remains beside the ideographs counts where it has a letter or digit in it.
    rest = sum(1 for word in _UNSPACED_RUN.sub(" ", text).split() if any(map(str.isalnum, word)))
    return characters + rest


class _Token(NamedTuple):
    text: str  # lower case
    start: int
    end: int
    unspaced: bool


def _tokens(text: str) -> Iterator[_Token]:
    for match in islice(_TOKEN.finditer(text), _MAX_WORDS):
        if match.end() - match.start() <= _MAX_WORD_LENGTH or match["unspaced"]:
            yield _Token(match[0].lower(), match.start(), match.end(), match["unspaced"] is not None)


def _terms(token: _Token) -> Sequence[str]:
    """Return what a token counts as: itself, or the overlapping pairs of a run without spaces."""
    if not token.unspaced or len(token.text) < 3:
        return (token.text,)
    return [token.text[at : at + 2] for at in range(len(token.text) - 1)]


# ---- language -------------------------------------------------------------------------------------------------------


class _Model:
    """The language model: loaded once per process, at the first use or ahead of it."""

    def __init__(self) -> None:
        self._identifier: Any = None  # guarded by _lock until it is set, never changed after
        self._lock = threading.Lock()
        # A fork while another thread loads would leave the child a lock that nobody opens.
        os.register_at_fork(after_in_child=self._new_lock)

    def _new_lock(self) -> None:
        self._lock = threading.Lock()

    def get(self) -> Any:
        if self._identifier is None:
            with self._lock:
                if self._identifier is None:
                    from py3langid.langid import MODEL_FILE, LanguageIdentifier  # type: ignore[import-untyped]

                    identifier = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
                    # The longer codes are of languages without an ISO 639-1 code.
                    identifier.set_languages([code for code in identifier.labels if len(code) == 2])
                    self._identifier = identifier
        return self._identifier


_model = _Model()


def load_language_model() -> None:
    """Load the language model and the stop words now, half a second that no request or forked job then pays."""
    _stopwords(detect_language("What is loaded at the first use is loaded by using it."))


def detect_language(text: str) -> str:
    """Return the ISO 639-1 code of the language that the text is most likely in; "en" where nothing tells.

    A word or two tells the model little. Where it is all but guessing, English wins unless clearly less likely.
    """
    sample = text[:LANGUAGE_SAMPLE]
    if not any(map(str.isalpha, sample)):
        return _UNDETERMINED
    ranking = _model.get().rank(sample)
    code: str = ranking[0][0]
    probability: float = ranking[0][1]
    if probability < 0.2:
        english: float = dict(ranking)[_UNDETERMINED]
        if probability < 0.05 or english * 3 >= probability:
            return _UNDETERMINED
    return code


def _stopwords(language: str) -> frozenset[str]:
    import stopwordsiso

    return frozenset(stopwordsiso.stopwords(language))


# ---- summary --------------------------------------------------------------------------------------------------------

_BOUNDARY = re.compile(
    r"(?P<full>[。！？｡．।॥؟۔։።]++[”’』」）)\"']*+)|(?P<stop>[.!?…]++[”’»)\]\"']*+)|(?P<gap>\n[ \t\r]*+\n)"
)


def split_sentences(text: str) -> list[str]:
    """Split into sentences: at full stops with a gap after them, at the stops of other scripts, at empty lines."""
    sentences: list[str] = []
    start = 0
    for match in _BOUNDARY.finditer(text):
        end = match.end()
        if match["stop"] is not None:
            following = text[end : end + 2]
            if following and not following[0].isspace():
                continue  # 3.14, example.org
            if match["stop"][0] == "." and following[1:2].islower():
                continue  # "e.g. this"
        sentence = " ".join(text[start:end].split())
        start = end
        if sentence:
            sentences.append(sentence)
            if len(sentences) == _MAX_SENTENCES:
                return sentences
    rest = " ".join(text[start:].split())
    if rest:
        sentences.append(rest)
    return sentences


def summarise(text: str) -> str:
    """Return :func:`summary_sentences` as one text."""
    return " ".join(summary_sentences(text))


def summary_sentences(text: str) -> list[str]:
    """Return the sentences that say most of what the text says, in its own order and words.

    At most SUMMARY_SENTENCES sentences and SUMMARY_LENGTH characters. A sentence counts for the frequent words in it
    (stop words of the text's language aside) and for standing early.

    Source: Luhn, *The Automatic Creation of Literature Abstracts* (1958); the weight on the lead is Edmundson's (1969).
    """
    sentences = split_sentences(text)
    if len(sentences) <= SUMMARY_SENTENCES and sum(map(len, sentences)) + len(sentences) <= SUMMARY_LENGTH:
        return sentences
    stop = _stopwords(detect_language(text))
    words_of = [
        [term for token in _tokens(sentence) for term in _terms(token) if term not in stop and not term.isdigit()]
        for sentence in sentences
    ]
    frequency = Counter(word for words in words_of for word in words)

    def score(position: int) -> float:
        words = words_of[position]
        if len(words) < 3:
            return 0.0  # a heading, a list's label
        # Distinct words only, over the square root of the length: neither repetition nor sheer length wins.
        weight = sum(frequency[word] for word in set(words)) / math.sqrt(len(words))
        return weight * (1.0 + 1.0 / (1 + position))

    best = sorted(range(len(sentences)), key=lambda position: (-score(position), position))
    chosen: list[int] = []
    said: set[str] = set()
    room = SUMMARY_LENGTH
    for position in best[:50]:
        sentence = sentences[position]
        if len(chosen) < SUMMARY_SENTENCES and len(sentence) + 1 <= room and sentence not in said:
            chosen.append(position)
            said.add(sentence)
            room -= len(sentence) + 1
    if not chosen:
        return [shorten(sentences[best[0]], SUMMARY_LENGTH)]
    return [sentences[position] for position in sorted(chosen)]


def shorten(text: str, length: int) -> str:
    """Cut to at most *length* characters, at a space where one is near, with an ellipsis."""
    if len(text) <= length:
        return text
    cut = text[: length - 1]
    space = cut.rfind(" ", length // 2)
    cut = cut if space < 0 else cut[:space]
    # Not between a letter and its accent, nor beside a joiner; a pile of accents without end is cut all the same.
    for _ in range(20):
        if not (unicodedata.combining(text[len(cut)]) or text[len(cut)] in "\u200d\ufe0f" or cut[-1:] == "\u200d"):
            break
        cut = cut[:-1]
    return cut.rstrip() + "…"


# ---- keywords -------------------------------------------------------------------------------------------------------


def extract_keywords(text: str, limit: int = KEYWORDS) -> list[str]:
    """Return the words and phrases, in lower case, that the text says most often, best first.

    A phrase is up to three words with no stop word or punctuation between them, said at least twice; a word that is
    said almost only within a chosen phrase is left out.

    Source: RAKE (Rose et al., 2010) for where phrases end; plain frequency for their rank, so that one long odd phrase
    does not win.
    """
    counts = _count_phrases(text, _stopwords(detect_language(text)))
    if not counts:
        counts = _count_phrases(text, frozenset())  # "hello world" is stop words only, and yet about something
    ranked = sorted(
        ((phrase, count * (1 + len(phrase)) / 2) for phrase, count in counts.items() if len(phrase) == 1 or count > 1),
        key=lambda entry: -entry[1],
    )
    chosen: list[tuple[str, ...]] = []
    for phrase, _ in ranked[: limit * 20]:
        if len(chosen) == limit:
            break
        if not any(_says_the_same(phrase, other, counts) for other in chosen):
            chosen.append(phrase)
    return [" ".join(phrase) for phrase in chosen]


def _count_phrases(text: str, stop: frozenset[str]) -> Counter[tuple[str, ...]]:
    counts: Counter[tuple[str, ...]] = Counter()  # insertion order is order of appearance, which breaks ties
    run: list[str] = []
    last_end = -1
    for token in _tokens(text):
        if token.unspaced:
            run.clear()
            counts.update((piece,) for piece in _unspaced_keywords(token.text, stop))
            continue
        if last_end >= 0 and not text[last_end : token.start].isspace():
            run.clear()  # punctuation between the two
        elif text.count("\n", last_end, token.start) > 1:
            run.clear()
        last_end = token.end
        word = token.text
        if len(word) < 2 or word in stop or word.isdigit():
            run.clear()
            continue
        run = [*run[-2:], word]
        for length in range(1, len(run) + 1):
            phrase = tuple(run[-length:])
            if length == 1 or len(set(phrase)) == length:
                counts[phrase] += 1
    return counts


def _says_the_same(phrase: tuple[str, ...], other: tuple[str, ...], counts: Counter[tuple[str, ...]]) -> bool:
    """Say whether one holds the other and little is lost by showing only the one that was chosen first."""
    if len(phrase) == 1 and len(other) == 1:
        return phrase[0] in other[0] and counts[phrase] <= counts[other] * 1.5 and bool(_UNSPACED_RUN.match(phrase[0]))
    short, long = sorted((phrase, other), key=len)
    inside = any(long[at : at + len(short)] == short for at in range(len(long) - len(short) + 1))
    return inside and counts[short] <= counts[long] * 1.5


# Chinese words that are grammar only. The stop-word lists have ideographs that also stand inside words: 人, 能.
_PARTICLES = frozenset("的了是在和與与及或而之也就都着过過把被让讓对對从從为為个個这這那其")


def _unspaced_keywords(run: str, stop: frozenset[str]) -> Iterator[str]:
    """Yield candidates from a run without spaces: katakana words, and ideographs between the particles."""
    for match in _KATAKANA_OR_HAN.finditer(run):
        piece = ""
        for character in match[0]:
            if character in _PARTICLES:
                yield from _pieces(piece, stop)
                piece = ""
            else:
                piece += character
        yield from _pieces(piece, stop)


def _pieces(piece: str, stop: frozenset[str]) -> Iterator[str]:
    if 2 <= len(piece) <= 4 or (piece and "\u30a0" <= piece[0] <= "\u30ff"):
        if len(piece) <= _MAX_WORD_LENGTH and piece not in stop:
            yield piece
    else:  # longer: nobody says where the words end, so pairs; common words are common pairs
        for at in range(len(piece) - 1):
            if piece[at : at + 2] not in stop:
                yield piece[at : at + 2]
