# SPDX-License-Identifier: Apache-2.0
"""The run's one tokenizer: trained on public text or opened, and kept as a folder that AutoTokenizer opens."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
from tokenizers import Encoding, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from deepfusion.data.options import TokenizerOptions
from deepfusion.errors import DataError

END_OF_TEXT = "<|endoftext|>"
_KNOWN_ENDS = (END_OF_TEXT, "</s>", "<eos>", "<|end_of_text|>", "<|im_end|>", "[EOS]", "[SEP]")
_CHUNK = 4096


def make_tokenizer(options: TokenizerOptions, texts: Iterable[str], root: Path, folder: Path) -> None:
    """Write the tokenizer that `options` ask for into `folder`, with an end-of-text token that is also the padding.

    A tokenizer that has no end-of-text token gets one. Training is deterministic.

    Args:
        texts: what to train on; read only when training.

    Raises:
        DataError: the file, folder or hub model holds no tokenizer that can be used.
    """
    if options.vocab_size is not None:
        tokenizer = _wrap(_train(texts, options.vocab_size), END_OF_TEXT)
    elif options.file is not None:
        tokenizer = _from_file(root / options.file)
    else:
        tokenizer = _from_model(options, root)
    tokenizer.save_pretrained(folder)


def tokenizer_from_json(text: str, end: str, folder: Path) -> None:
    """Write the tokenizer that a `tokenizer.json` describes into `folder`.

    Args:
        end: its end-of-text token.

    Raises:
        DataError: it describes none, or one that fails on a text with a word that it does not know.
    """
    try:
        tokenizer = Tokenizer.from_str(text)
    except Exception as error:  # the library raises nothing narrower
        raise DataError(f"not a tokenizer.json ({error}); save one with Tokenizer.save(...)") from error
    if not _reads_everything(json.loads(tokenizer.to_str())["model"]):
        raise DataError("its tokenizer.json fails on words that it does not know; give its model an unknown token")
    _wrap(tokenizer, end).save_pretrained(folder)


def _reads_everything(model: Mapping[str, Any]) -> bool:
    """Whether the `model` part of a tokenizer.json has a token for what it does not know, or leaves that out."""
    if model["type"] == "Unigram":
        return model["unk_id"] is not None
    unknown = model["unk_token"]
    return unknown in model["vocab"] or (unknown is None and model["type"] == "BPE")


def open_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """The tokenizer of a model folder, or the one that `make_tokenizer` wrote.

    Raises:
        DataError: there is none, it knows no offsets, or it has no end-of-text token.
    """
    tokenizer = _open(str(folder), f"tokenizer {folder}")
    if tokenizer.eos_token_id is None:
        raise DataError(
            f"tokenizer {folder}: names no eos_token to end documents with; add it to tokenizer_config.json"
        )
    return tokenizer


def is_blank(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether it can read nothing, as AutoTokenizer makes one where a model's folder has no tokenizer."""
    return len(tokenizer) <= len(tokenizer.all_special_tokens)


def end_id(tokenizer: PreTrainedTokenizerFast) -> int:
    """Id of the token that ends a document."""
    return cast(int, tokenizer.eos_token_id)


def vocabulary_of(tokenizer: PreTrainedTokenizerFast) -> int:
    """One more than the largest of the tokenizer's ids: as many rows a model's embedding needs."""
    return 1 + max(tokenizer.get_vocab().values())


def encode(
    tokenizer: PreTrainedTokenizerFast, texts: Sequence[str], answer_starts: Sequence[int]
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Token ids (int64) and counted flags (bool) of each text, its end-of-text token included.

    Args:
        answer_starts: for each text the character at which counting begins; a token counts when it ends beyond it.
    """
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True  # a text that spells "<|endoftext|>" does not end there
    end = end_id(tokenizer)
    for begin in range(0, len(texts), _CHUNK):
        encodings = backend.encode_batch(list(texts[begin : begin + _CHUNK]), add_special_tokens=False)
        for encoding, start in zip(encodings, answer_starts[begin : begin + _CHUNK], strict=True):
            yield np.asarray([*encoding.ids, end], np.int64), np.append(_ends(encoding, start), True)


def _ends(encoding: Encoding, start: int) -> np.ndarray:
    if start == 0:
        return np.ones(len(encoding), bool)
    return np.fromiter((end > start for _, end in encoding.offsets), bool, len(encoding))


def _train(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _wrap(tokenizer: Tokenizer, end: str) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=end, bos_token=end, pad_token=end, clean_up_tokenization_spaces=False
    )


def _from_file(path: Path) -> PreTrainedTokenizerFast:
    if not path.is_file():
        raise DataError(f"[data.tokenizer] file: there is no {path}; mend the path or [data] root")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
        raise DataError(f"{path}: not a tokenizer.json ({error}); save one with Tokenizer.save(...)") from error
    end = next((token for token in _KNOWN_ENDS if tokenizer.token_to_id(token) is not None), END_OF_TEXT)
    return _wrap(tokenizer, end)


def _from_model(options: TokenizerOptions, root: Path) -> PreTrainedTokenizerFast:
    key, name = ("folder", str(root / options.folder)) if options.folder is not None else ("hub", str(options.hub))
    if options.folder is not None and not (root / options.folder).is_dir():
        raise DataError(f"[data.tokenizer] folder: there is no {name}; mend the path or [data] root")
    tokenizer = _open(name, f'[data.tokenizer] {key} = "{name}"')
    if tokenizer.eos_token is None:
        tokenizer.add_special_tokens({"eos_token": END_OF_TEXT})
    tokenizer.pad_token = tokenizer.eos_token  # its id must lie within every model's embedding
    return tokenizer


def _open(name: str, place: str) -> PreTrainedTokenizerFast:
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, KeyError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise DataError(
            f"{place}: {reason}; check the name, or where there is a network run "
            'AutoTokenizer.from_pretrained(...).save_pretrained("FOLDER") and name the folder'
        ) from error
    if is_blank(tokenizer):
        raise DataError(f"{place}: has no vocabulary; save one there (tokenizer.json)")
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise DataError(
            f"{place}: is not of the tokenizers library, so it knows no offsets; use a model that has a tokenizer.json"
        )
    return tokenizer
