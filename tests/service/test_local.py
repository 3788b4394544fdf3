"""The local summary, keywords and language: plain functions of the text, linear on any text."""

from __future__ import annotations

import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from blueprints.documents import local

ROOT = Path(__file__).parents[2]
PARAGRAPH = (
    "The event loop runs on one thread. Every caller waits for the event loop on a thread of its own. "
    "It rained in the afternoon. A blocked event loop stops every caller at once. Nobody knows why cats purr. "
    "When the event loop stops, each waiting caller gets an error. Tea was served at five. "
) * 3


# ---- summary


def test_summary_is_the_text_itself_when_that_is_short() -> None:
    """What is short already needs no summary."""
    assert local.summarise("One sentence.  And\nanother one.") == "One sentence. And another one."


def test_summary_takes_whole_sentences_of_the_text_when_it_is_long() -> None:
    """A summary is made of the text's own sentences, about its main matter, in their order, within the bounds."""
    summary = local.summarise(PARAGRAPH)
    sentences = local.split_sentences(summary)
    assert 1 <= len(sentences) <= local.SUMMARY_SENTENCES
    assert all(sentence in PARAGRAPH and "event loop" in sentence for sentence in sentences)
    assert len(set(sentences)) == len(sentences)
    assert len(summary) <= local.SUMMARY_LENGTH
    positions = [PARAGRAPH.index(sentence) for sentence in sentences]
    assert positions == sorted(positions)


def test_summary_favours_the_first_sentences_when_all_say_as_much() -> None:
    """Of sentences that weigh the same, the early ones win."""
    text = " ".join(f"Alpha{n} beta{n} gamma{n} delta{n} epsilon{n} zeta{n}." for n in range(40))
    assert local.summarise(text).startswith("Alpha0 ")


def test_summary_is_cut_when_one_sentence_is_longer_than_a_summary_may_be() -> None:
    """One endless sentence is cut at a word, with an ellipsis."""
    summary = local.summarise("endless words " * 1000)
    assert len(summary) <= local.SUMMARY_LENGTH
    assert summary.endswith(("words…", "endless…"))


def test_summary_splits_at_the_full_stops_of_other_scripts() -> None:
    """Chinese, Japanese and Hindi sentences end where their own full stops stand."""
    assert local.split_sentences("你好。世界！好？是") == ["你好。", "世界！", "好？", "是"]
    assert local.split_sentences("नमस्ते। दुनिया।") == ["नमस्ते।", "दुनिया।"]


def test_summary_keeps_a_sentence_whole_when_a_dot_is_inside_it() -> None:
    """A number, a host name or an abbreviation ends no sentence; an empty line does."""
    assert local.split_sentences("Pi is 3.14, see example.org, e.g. there. Next\n\nTitle") == [
        "Pi is 3.14, see example.org, e.g. there.",
        "Next",
        "Title",
    ]


@pytest.mark.parametrize("text", ["é" * 700, "e\u0301" * 400, "👨\u200d👩\u200d👧" * 200, "\u0301" * 700])
def test_shorten_keeps_to_its_length_when_marks_pile_up(text: str) -> None:
    """A cut text has at most the length asked for and never begins a dangling join."""
    cut = local.shorten(text, 100)
    assert len(cut) <= 100
    assert not cut.endswith("\u200d…")


# ---- keywords


def test_keywords_are_what_the_text_says_most_often() -> None:
    """The main phrase comes first, stop words never, at most KEYWORDS, all in lower case."""
    keywords = local.extract_keywords(PARAGRAPH)
    assert keywords[0] == "event loop"
    assert "the" not in keywords
    assert len(keywords) <= local.KEYWORDS
    assert keywords == [keyword.lower() for keyword in keywords]
    assert len(set(keywords)) == len(keywords)


def test_keywords_do_not_join_words_across_punctuation() -> None:
    """A phrase never reaches over a comma or a full stop."""
    keywords = local.extract_keywords("kernel, driver. kernel, driver. kernel, driver.")
    assert set(keywords) == {"kernel", "driver"}


def test_keywords_are_found_when_all_words_are_stop_words() -> None:
    """A text of stop words only is still about something."""
    assert local.extract_keywords("hello world") == ["hello", "world"]


def test_keywords_are_words_when_the_script_has_no_spaces() -> None:
    """Chinese and Japanese texts give words, not whole sentences."""
    assert local.extract_keywords("人工智能是一个分支。人工智能研究机器。机器学习是人工智能的核心。")[0] == "人工智能"
    japanese = local.extract_keywords("東京タワーは東京にあります。コンピュータは便利です。コンピュータを使います。")
    assert "コンピュータ" in japanese
    assert "東京" in japanese


def test_keywords_keep_words_whole_when_they_have_vowel_signs() -> None:
    """Combining marks, apostrophes and underscores belong to the word."""
    keywords = local.extract_keywords("दुनिया दुनिया। tta_sync, tta_sync.")
    assert "दुनिया" in keywords
    assert "tta_sync" in keywords


def test_keywords_leave_out_what_is_no_word_when_tokens_are_endless() -> None:
    """A token longer than any word, or a number, is no keyword."""
    assert local.extract_keywords("a" * 1000 + " 12345 12345 12345") == []


# ---- language and words


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("The quick brown fox jumps over the lazy dog.", "en"),
        ("Der schnelle braune Fuchs springt über den faulen Hund.", "de"),
        ("Le renard brun rapide saute par-dessus le chien paresseux.", "fr"),
        ("Быстрая коричневая лиса прыгает через ленивую собаку.", "ru"),
        ("これは日本語の文章です。", "ja"),
        ("这是一个中文句子。", "zh"),
        ("이것은 한국어 문장입니다.", "ko"),
        ("hello world", "en"),
        ("hi", "en"),
        ("!!! 123 😀", "en"),
        ("", "en"),
    ],
)
def test_language_is_the_texts_own_when_it_tells_and_english_when_nothing_does(text: str, code: str) -> None:
    """The ISO 639-1 code of the text's language; "en" where there is nothing to go by."""
    assert local.detect_language(text) == code


def test_language_is_always_a_two_letter_code() -> None:
    """No text gets a code that ISO 639-1 does not have."""
    chance = random.Random(7)
    for _ in range(50):
        text = "".join(
            chr(chance.choice((chance.randrange(32, 0x500), chance.randrange(0x900, 0xD000)))) for _ in range(60)
        )
        code = local.detect_language(text)
        assert len(code) == 2
        assert code.isalpha()


def test_language_model_is_loaded_once_when_threads_ask_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads that ask first together share one load."""
    from py3langid.langid import LanguageIdentifier

    loads: list[int] = []
    original = LanguageIdentifier.from_model_file
    monkeypatch.setattr(local, "_model", local._Model())
    monkeypatch.setattr(LanguageIdentifier, "from_model_file", lambda *a, **k: loads.append(1) or original(*a, **k))
    threads = [threading.Thread(target=local.load_language_model) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert loads == [1]


def test_language_model_loads_in_a_child_that_was_forked_during_the_load() -> None:
    """A child forked while another thread holds the model's lock is not left waiting for it."""
    program = """
import os
from blueprints.documents import local
with local._model._lock:
    pid = os.fork()
    if pid == 0:
        os._exit(0 if local.detect_language("Der Hund schläft heute nicht im Haus.") == "de" else 1)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "0", done.stderr


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("one two  three\n", 3),
        ("don't stop-now", 2),
        ("", 0),
        ("...", 1),
        ("中文字", 3),
        ("中文 and 日本。", 5),
        ("한국어 문장", 2),
    ],
)
def test_words_are_counted_as_wc_does_and_by_character_where_there_are_no_spaces(text: str, count: int) -> None:
    """Runs between spaces count once, ideographs and kana one each."""
    assert local.count_words(text) == count


# ---- any text

N = 200_000
CHANCE = random.Random(1)
WORST = {
    "one giant word": "a" * N,
    "newlines": "\n" * N,
    "newlines and blanks": "\n \t" * (N // 3),
    "dots": "." * N,
    "dots that end nothing": ("." * (N // 2 - 1) + "x") * 2,
    "quotes": '."' * (N // 2),
    "emoji": "😀" * N,
    "joined emoji": "👨\u200d👩\u200d👧" * (N // 5),
    "distinct words": " ".join("".join(CHANCE.choices("abcdefghij", k=4)) for _ in range(N // 5)),
    "distinct numbers": " ".join(map(str, range(N)))[:N],
    "distinct ideographs": "".join(chr(CHANCE.randrange(0x4E00, 0x9FFF)) for _ in range(N)),
    "katakana": "ア" * N,
    "apostrophes": "a'" * (N // 2),
    "marks": "a" + "\u0301" * (N - 1),
    "joiners": "\u200d" * N,
    "short sentences": "A b. " * (N // 5),
    "stop words": "the " * (N // 4),
    "vowel signs": "क्षि" * (N // 4),
    "underscores": "_" * N,
}


@pytest.mark.parametrize("name", WORST)
@pytest.mark.parametrize(
    "function", [local.summarise, local.extract_keywords, local.detect_language, local.count_words]
)
def test_local_work_is_quick_and_the_same_twice_whatever_the_text(function: Callable[[str], object], name: str) -> None:
    """The longest text of the worst shape costs well under a second of CPU, and gives the same answer again."""
    local.load_language_model()
    text = WORST[name]
    began = time.thread_time()
    answer = function(text)
    spent = time.thread_time() - began
    assert spent < 5, f"{spent:.1f} s of CPU"  # measured: 0.2 s at most; what is quadratic takes minutes
    assert function(text) == answer
    if function is local.summarise:
        assert len(str(answer)) <= local.SUMMARY_LENGTH


def test_local_work_reads_real_texts() -> None:
    """A licence text gives a summary, keywords and a language that belong to it."""
    licence = Path("/usr/share/common-licenses/GPL-3")
    if not licence.exists():
        pytest.skip("no licence texts on this machine")
    text = licence.read_text()
    assert "license" in local.extract_keywords(text)
    assert local.detect_language(text) == "en"
    assert 100 < len(local.summarise(text)) <= local.SUMMARY_LENGTH
