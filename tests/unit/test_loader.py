"""What an interrupted load is told about each of its files: what is left of it, and what to do about that."""

import pytest

from api.loader import STDIN, Loaded
from engine.errors import CommandError

UPLOADED = {"key": "01K-a.ndjson", "note": object()}  # by a command that can resume


@pytest.mark.parametrize(
    ("known", "advice"),
    [
        ({"job_id": "6b04", **UPLOADED}, "`headrace status 6b04 --wait`"),
        ({"job_id": "6b04", "whole": "submit it"}, "`headrace status 6b04 --wait`"),
        (UPLOADED, "run the same command again, and it resumes"),
        ({"note": object()}, "run the same command again, and it resumes"),
        ({"key": "01K-a.ndjson"}, "`headrace jobs --file 01K-a.ndjson`"),
        ({"whole": "submit it"}, "look for it with `headrace jobs`; if not, submit it"),
        ({"whole": "submit it", "error": CommandError("the API went away; submit it")}, "the API went away; submit it"),
        ({}, "run the same command again"),
        ({"file": STDIN}, "nothing of it is kept"),
    ],
)
def test_the_advice_fits_how_far_the_file_had_come(known, advice):
    assert advice in Loaded(**{"file": "a.ndjson"} | known).advice()


def test_only_a_job_that_was_watched_to_its_end_needs_no_advice():
    assert not Loaded("a.ndjson").ended()
    assert not Loaded("a.ndjson", status={"status": "PROCESSING"}).ended()
    assert Loaded("a.ndjson", status={"status": "CANCELLED"}).ended()
