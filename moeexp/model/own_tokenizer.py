"""The tokenizer that a snapshot brings, loaded by transformers from files that are whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moeexp.config.files import MOST_BYTES, check_pointer, cut, is_inside, read_object, short

# Files that hold a vocabulary: tokenizer.json everything, the others what older tokenizers are made of.
VOCABULARIES = ("tokenizer.json", "vocab.json", "vocab.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model")
OBJECTS = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "added_tokens.json", "special_tokens_map.json")
# Which transformers reads whole.
PLAIN = ("merges.txt", "chat_template.jinja", "additional_chat_templates/*.jinja", *VOCABULARIES[2:])
WAY_OUT = "fetch the file again, or use model.tokenizer=none with prompt_ids"


def own_tokenizer(folder: Path) -> Any:
    """transformers' tokenizer of the folder. `ValueError`, one line with the file's name, where its files cannot serve."""
    files = [folder / name for name in OBJECTS if (folder / name).is_file()]
    for path in files:
        found = read_object(path)
        if path.name == "tokenizer_config.json":
            _check_names(path, found)
    for path in (path for name in PLAIN for path in folder.glob(name) if path.is_file()):
        check_pointer(path)
        if path.stat().st_size > MOST_BYTES:
            raise ValueError(f"{path} has more than {MOST_BYTES:,} bytes, and no such file has: {WAY_OUT}")
    # Imported here: only a snapshot with a tokenizer of its own needs transformers for it.
    from transformers import AutoTokenizer

    named = (folder / "tokenizer.json") if (folder / "tokenizer.json").is_file() else folder / "tokenizer_config.json"
    try:
        # Never the snapshot's own Python code, and no question on the terminal whether it may run.
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        tokens = tokenizer("0 a", add_special_tokens=False)["input_ids"]  # some settings are read only here
        tokenizer.decode(tokens)
    except Exception as error:
        why = cut(f"{type(error).__name__}: {error}", 200)
        raise ValueError(f"transformers cannot load the tokenizer of {named} ({why}): {WAY_OUT}") from error
    has = any((folder / name).is_file() for name in VOCABULARIES)
    if not has and not tokens:  # it loads, and is empty
        raise ValueError(f"the tokenizer of {named} knows no text, as its vocabulary ({VOCABULARIES[0]}) is missing: {WAY_OUT}")
    return tokenizer


def _check_names(path: Path, config: dict[str, Any]) -> None:
    """`ValueError` for a vocabulary outside the folder. transformers opens what these keys name as it stands, from wherever
    the process runs, and leaves them out where it saves a tokenizer."""
    for key, value in config.items():
        if (key in ("vocab", "merges") or key.endswith("_file")) and key != "special_tokens_map_file" and isinstance(value, str):
            raise ValueError(f"{path}: {cut(key, 40)}={short(value)} names a file: remove the key, the folder's own are read")
    versions = config.get("fast_tokenizer_files") or []
    if not isinstance(versions, list) or not all(map(is_inside, versions)):
        raise ValueError(
            f"{path}: fast_tokenizer_files={short(versions)} must be a list of files below its folder: mend it, or remove the key"
        )
