"""The sample: the same bytes for the same seed, about 270 bytes a line, every line a document."""

import orjson

from engine.local import sample


def test_a_seed_gives_the_same_bytes_and_another_seed_others():
    assert list(sample.lines(50, 1)) == list(sample.lines(50, 1))
    assert list(sample.lines(50, 1)) != list(sample.lines(50, 2))


def test_every_line_is_an_object_of_about_270_bytes(tmp_path):
    size = sample.write(tmp_path / "s", 1000)
    lines = (tmp_path / "s").read_bytes().splitlines()
    assert (len(lines), size) == (1000, (tmp_path / "s").stat().st_size)
    assert all(type(orjson.loads(line)) is dict for line in lines)
    assert 240 <= size / 1000 <= 300
