"""T5's tokenizers in the two forms in which models hold them."""

from __future__ import annotations

import pytest
from transformers.convert_slow_tokenizer import import_protobuf

from fourdfy.config import ConfigError
from fourdfy.priors.frozen import load_tokenizer
from tests.tiny_models import save_wan, unigram_pieces


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_wan(tmp_path_factory.mktemp("models") / "wan")


def test_a_vocabulary_of_sentencepiece_is_read_without_its_package(folder, tmp_path):
    """LTX-Video and CogVideoX have no ``tokenizer.json``."""
    place = tmp_path / "tokenizer"
    place.mkdir()
    (place / "tokenizer_config.json").write_text('{"tokenizer_class": "T5Tokenizer", "extra_ids": 0}')
    with pytest.raises(ConfigError, match=r"holds no tokenizer .*vocab.json is missing"):
        load_tokenizer(tmp_path, "T5Tokenizer")
    model = import_protobuf().ModelProto()
    for piece, score in unigram_pieces():
        model.pieces.add(piece=piece, score=score)
    (place / "spiece.model").write_bytes(model.SerializeToString())
    given, wanted = (load_tokenizer(where, "T5Tokenizer") for where in (tmp_path, folder))
    for text in ("a panda  dancing", "ein Panda", ""):
        assert given(text).input_ids == wanted(text).input_ids
    assert len(given) == len(wanted)
    (place / "spiece.model").write_bytes(b"no vocabulary")
    with pytest.raises(ConfigError, match="tokenizer can't be loaded"):
        load_tokenizer(tmp_path, "T5Tokenizer")
