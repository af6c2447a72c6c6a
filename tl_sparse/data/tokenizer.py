"""Byte-level BPE tokenizers for Python code, in which the candidates of the tasks are single
tokens.

The usual byte-level pre-tokenizer separates `):` from the newline after it and `=` from `None`. The
tasks of the paper (Gao et al. 2025, arXiv 2511.13653, Table 1: `):\\n`, `=None`, `True:\\n`, …)
therefore need a pre-tokenizer of their own, which is `PIECES` below. Two properties matter more
than compression: the quote that opens a string never shares a token with a letter of that string,
and the quote that closes it never shares a token with the newline after it.
"""

import base64
import json
from collections.abc import Iterable, Iterator, Sequence
from os import PathLike
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode, generate_merges

from tl_sparse.errors import TokenizerError, counted
from tl_sparse.files import utf8_path
from tl_sparse.parsing import check_is_file
from tl_sparse.tasks import token_ids

END_OF_TEXT = "<|endoftext|>"
_SPECIAL_TOKENS = dict.fromkeys(("bos_token", "eos_token", "pad_token", "unk_token"), END_OF_TEXT)

# The pieces into which text is cut before BPE, which merges within a piece and never across pieces.
# The first alternative that matches wins, and together they match any text, so nothing is lost.
PIECES = "|".join(
    (
        r" {2,}",  # a whole indentation: the word after it gets no space
        r"\n+",  # newlines alone, so that `')` is the same token before a newline and elsewhere
        r" ?True:?\n",  # `True` with its newline, for the task var_if
        r"=None(?![\p{L}\p{N}_])",  # the default of a parameter
        # A word with the space before it, or with the dot that makes it an attribute.
        r"[ .]?[\p{L}_][\p{L}\p{N}_]*",
        r" ?\p{N}+",
        # A run of punctuation, which ends before the dot of an attribute. If it ends in a colon, it
        # includes the newline after that.
        r" ?(?:(?!\.[\p{L}_])[^\s\p{L}\p{N}_])+(?:(?<=:)\n)?",
        r"\s",  # any other white space, one character at a time
    )
)

# A required string is added to the training text once per this many characters. That is far more
# often than the rarest merges of any useful vocabulary occur, so the string is merged before the
# vocabulary is full.
_REQUIRED_EVERY = 200

#: A vocabulary may have this many ids without a token, as where tokens were removed. When a
#: tokenizer is copied or saved, the Rust library takes time and memory for each of them, without a
#: bound: an id of 2**31 ends the process.
_MAX_GAPS = 1_000_000


def train_tokenizer(
    texts: Iterable[str], vocab_size: int, required: Sequence[str] = ()
) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer of exactly `vocab_size` entries. The texts are read once;
    the same texts give the same tokenizer.

    `<|endoftext|>` has the last id, `vocab_size - 1`, and is the beginning-of-text, end-of-text,
    padding and unknown token. Decoding the ids of any text gives back exactly that text. Each of
    the `required` strings is a single token, even when it is rare in `texts`.

    Raises:
        TokenizerError: if `vocab_size` is below 257, if the text is too small for it, if `texts`
            are not texts, or if a required string cannot be a single token, because the
            pre-tokenizer cuts it (`PIECES`) or the vocabulary has no room for it.
    """
    if type(vocab_size) is not int or vocab_size < 257:
        raise TokenizerError(
            f"vocab_size is {vocab_size!r}; a byte-level tokenizer needs an integer of at least "
            "257 (d_vocab of the model, --d-vocab)"
        )
    for name, given in (("texts", texts), ("required", required)):
        if isinstance(given, str) or not isinstance(given, Iterable):
            raise TokenizerError(f"{name} must be texts in a list, not a {type(given).__name__}")
    backend = _byte_level_bpe(models.BPE(), _code_pre_tokenizer())
    for text in required:
        _check_one_piece(backend, text)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1,  # without `<|endoftext|>`
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(_with_required(texts, required), trainer)
    size = backend.get_vocab_size() + 1
    if size != vocab_size:
        raise TokenizerError(
            f"the text is too small for vocab_size {vocab_size}: it gives only {size} entries; "
            f"give more text, or a smaller vocabulary (d_vocab of the model, --d-vocab), of at "
            f"most {size}"
        )
    tokenizer = _for_transformers(_with_end_of_text(backend), **_SPECIAL_TOKENS)
    _check_room(tokenizer, required)
    return tokenizer


def _check_room(tokenizer: PreTrainedTokenizerFast, required: Sequence[str]) -> None:
    """Raise `TokenizerError` if the vocabulary had no room for some of the required strings."""
    missing = [text for text in required if len(token_ids(tokenizer, text)) != 1]
    if missing:
        raise TokenizerError(
            f"a vocabulary of {len(tokenizer):,} entries has no room for "
            f"{len(missing)} of the {counted(len(required), 'string')} that must be single tokens, "
            f"such as {missing[0]!r} (in training, these are the answers of the built-in tasks); "
            "give a larger vocabulary (d_vocab of the model, --d-vocab)"
        )


def _code_pre_tokenizer() -> pre_tokenizers.PreTokenizer:
    """A pre-tokenizer that cuts text into `PIECES` and spells each of them as bytes."""
    pieces = pre_tokenizers.Split(Regex(PIECES), behavior="isolated")
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([pieces, as_bytes])


def _byte_level_bpe(model: models.Model, pre_tokenizer: pre_tokenizers.PreTokenizer) -> Tokenizer:
    backend = Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizer
    backend.decoder = decoders.ByteLevel()
    return backend


def _check_text(text: object) -> None:
    """Raise `TokenizerError` for what a tokenizer cannot be trained on."""
    if not isinstance(text, str):
        raise TokenizerError(f"each text must be a str, not {type(text).__name__}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise TokenizerError(f"a text holds half a character: {error}") from error


def _check_one_piece(backend: Tokenizer, text: str) -> None:
    _check_text(text)
    pieces = backend.pre_tokenizer.pre_tokenize_str(text)
    if len(pieces) != 1:
        parts = [text[start:end] for _, (start, end) in pieces]
        raise TokenizerError(
            f"{text!r} cannot be one token: the pre-tokenizer cuts it into {parts}"
        )


def _with_required(texts: Iterable[str], required: Sequence[str]) -> Iterator[str]:
    """`texts`, and then the required strings, repeated often enough that they are merged before the
    vocabulary is full.
    """
    n_chars = 0
    for text in texts:
        _check_text(text)
        n_chars += len(text)
        yield text
    for _ in range(1 + n_chars // _REQUIRED_EVERY):
        yield from required


def _with_end_of_text(backend: Tokenizer) -> Tokenizer:
    """The trained tokenizer with `<|endoftext|>` as its last entry.

    The trainer would put a special token first, and a special token that is added afterwards does
    not count towards the size of the vocabulary. Written into the vocabulary itself,
    `<|endoftext|>` is last and counts.
    """
    state = json.loads(backend.to_str())
    state["model"]["vocab"][END_OF_TEXT] = backend.get_vocab_size()
    return Tokenizer.from_str(json.dumps(state))


def _for_transformers(backend: Tokenizer, **special_tokens: str) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, clean_up_tokenization_spaces=False, **special_tokens
    )


def load_tokenizer(source: str | Path) -> PreTrainedTokenizerFast:
    """Load a tokenizer from a file, or from the folder that holds it: a `tokenizer.json`, alone or
    beside transformers' own files; a `*.tiktoken` file; or `vocab.json` with `merges.txt`.

    Nothing is downloaded and no code from the folder is run. The last two formats do not specify
    how text is cut before BPE, so it is cut as in GPT-2. A `.tiktoken` file has no special tokens
    either; `<|endoftext|>` gets the id after the last one. If the files name no special tokens and
    the vocabulary has `<|endoftext|>`, as in OpenAI's `tinypython_2k`, this becomes the
    beginning-of-text, end-of-text, padding and unknown token.

    Raises:
        TokenizerError: if there is no tokenizer, or it cannot be read.
    """
    path = find_tokenizer(source)
    if path is None:
        raise TokenizerError(
            f"no tokenizer.json in {source}; save one there with tokenizer.save_pretrained(folder)"
        )
    try:
        with utf8_path(path) as readable:
            tokenizer = _read_tokenizer(readable)
        _check_tokenizer(tokenizer)
    except Exception as error:  # the Rust library raises a bare Exception on a damaged file
        raise TokenizerError(f"{path} is not a tokenizer that can be read: {error}") from error
    if tokenizer.bos_token is None and END_OF_TEXT in tokenizer.get_vocab():
        tokenizer.add_special_tokens(_SPECIAL_TOKENS)
    return tokenizer


def find_tokenizer(source: str | Path) -> Path | None:
    """The file that `load_tokenizer` reads; None if there is none.

    Raises:
        TokenizerError: if `source` is not a path.
    """
    if not isinstance(source, str | PathLike) or "\0" in str(source):
        raise TokenizerError(f"source = {source!r} is not the path of a tokenizer or its folder")
    folder = Path(source)
    paths = [
        folder,
        folder / "tokenizer.json",
        *sorted(folder.glob("*.[tT][iI][kK][tT][oO][kK][eE][nN]")),
    ]
    if (folder / "merges.txt").is_file():
        paths.append(folder / "vocab.json")
    for path in paths:
        if path.is_file():
            return path
    return None


def _read_tokenizer(path: Path) -> PreTrainedTokenizerFast:
    if path.suffix.lower() == ".tiktoken":
        return _like_gpt2(_tiktoken_model(path))
    if path.name == "vocab.json":
        return _like_gpt2(models.BPE.from_file(str(path), str(path.with_name("merges.txt"))))
    if path.name == "tokenizer.json" and path.with_name("tokenizer_config.json").is_file():
        for beside in path.parent.iterdir():
            if beside.suffix in (".json", ".jinja"):  # transformers reads some of these too
                check_is_file(beside)
        return PreTrainedTokenizerFast.from_pretrained(str(path.parent), local_files_only=True)
    return PreTrainedTokenizerFast(tokenizer_file=str(path), clean_up_tokenization_spaces=False)


def _check_tokenizer(tokenizer: PreTrainedTokenizerFast) -> None:
    """Raise `ValueError` for what the libraries take over without looking at it."""
    _check_ids(tokenizer.backend_tokenizer)
    limit = tokenizer.model_max_length
    if not isinstance(limit, int | float):
        raise ValueError(f"model_max_length = {limit!r} is not a number")
    settings = json.dumps(tokenizer.init_kwargs, ensure_ascii=False, default=str)
    settings.encode()  # half a character in a setting could not be saved again


def _like_gpt2(model: models.BPE) -> PreTrainedTokenizerFast:
    """A tokenizer that cuts text as GPT-2 does, and then merges it with `model`."""
    backend = _byte_level_bpe(model, pre_tokenizers.ByteLevel(add_prefix_space=False))
    _check_ids(backend)  # before transformers copies it
    return _for_transformers(backend)


def _check_ids(backend: Tokenizer) -> None:
    """Raise `ValueError` if the ids of the tokens are not more or less those from 0 on."""
    ids = backend.get_vocab().values()
    last = max(ids, default=0)
    if last - len(ids) > _MAX_GAPS:
        raise ValueError(
            f"a token has the id {last:,}, which leaves more than {_MAX_GAPS:,} ids without a "
            f"token in a vocabulary of {len(ids):,} tokens"
        )


def _tiktoken_model(path: Path) -> models.BPE:
    """The BPE model of a file that has a token in base64 and its rank on each line.

    The file lists no merges: two tokens merge if their concatenation is a token.
    """
    letters = bytes_to_unicode()
    vocab: dict[str, int] = {}
    n_lines = 0
    for line in path.read_bytes().splitlines():
        if line.strip():
            token, rank = line.split()
            spelling = "".join(letters[byte] for byte in base64.b64decode(token, validate=True))
            vocab[spelling] = int(rank)
            n_lines += 1
    if len(set(vocab.values())) < n_lines or not set(letters.values()) <= vocab.keys():
        raise ValueError("a token or rank appears twice, or one of the 256 bytes is missing")
    merges = generate_merges(vocab, None)
    vocab[END_OF_TEXT] = max(vocab.values()) + 1
    return models.BPE(vocab=vocab, merges=merges, ignore_merges=True)
