"""What is said of failures: never a secret, and the nearest of what there is."""

from __future__ import annotations

import errno

import pytest

from pgdist.errors import WeightsError
from pgdist.hub import cache, failures
from pgdist.hub.failures import Asked

SIGNED = [
    "GET https://storage.googleapis.com/a/b.npz?X-Goog-Signature=ab12&Expires=7 failed",
    "HTTPSConnectionPool(host='x'): Max retries exceeded with url: /b.npz?X-Goog-Signature=ab12 (Caused by y)",
    "'https://cdn/b?Policy=ab12'",
    "ab12 in a header",
]


@pytest.mark.parametrize("text", SIGNED)
def test_no_secret_is_in_a_message(monkeypatch, text):
    monkeypatch.setenv("HF_TOKEN", "ab12")
    said = failures.unknown(RuntimeError(text)).happened
    assert "ab12" not in said and said.startswith("it cannot be fetched (RuntimeError: ")
    monkeypatch.delenv("HF_TOKEN")
    if "?" in text:
        assert "ab12" not in failures.unreachable("Kaggle", RuntimeError(text)).happened


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            OSError(errno.ENOSPC, "No space left on device"),
            "no space left for it in /cache (No space left on device)",
        ),
        (
            OSError(errno.EDQUOT, "Disk quota exceeded"),
            "no space left for it in /cache (Disk quota exceeded)",
        ),
        (RuntimeError("io: No space left on device (os error 28)"), "no space left for it in /cache"),
        (
            PermissionError(errno.EACCES, "Permission denied"),
            "the cache /cache cannot be written (Permission denied)",
        ),
        (
            OSError(errno.EROFS, "Read-only file system"),
            "the cache /cache cannot be written (Read-only file system)",
        ),
    ],
)
def test_what_a_disk_did_is_found_under_what_it_led_to(error, said):
    outer = ValueError("download failed")
    outer.__cause__ = error
    trouble = failures.local_trouble(outer, folder="/cache", variable="HF_HOME")
    assert trouble.happened.startswith(said) and "HF_HOME" in trouble.remedy
    assert failures.local_trouble(ValueError("other"), folder="/cache", variable="HF_HOME") is None


def test_a_failure_names_what_was_asked_what_happened_and_what_to_do():
    asked = Asked(name="hf://a/b", field="config.init", error=WeightsError)
    failure = asked.failed(failures.unreachable("https://huggingface.co", TimeoutError()))
    assert isinstance(failure, WeightsError) and str(failure) == (
        "config.init=hf://a/b: https://huggingface.co cannot be reached from this host, and there is no complete copy "
        "in its cache (TimeoutError: no answer in time). If this host has no way out, download it elsewhere and give "
        "the local path; or try again later."
    )


def test_sizes_are_readable():
    assert [cache.size_text(size) for size in (0, 999, 12_345, 605_100_000, 5_850_000_000)] == [
        "0 bytes", "999 bytes", "12.3 kB", "605.1 MB", "5.8 GB"
    ]  # fmt: skip
