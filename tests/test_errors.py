"""Errors: the tree, rebuilding from one string, secrets kept out."""

from __future__ import annotations

import inspect
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st
from property_settings import examples
from torch._utils import ExceptionWrapper

from rasteret_ml import errors
from rasteret_ml.errors import RasteretError, redact

CLASSES = [value for _, value in inspect.getmembers(errors, inspect.isclass) if value.__module__ == errors.__name__]
MESSAGE = "record S2A, band B04: what happened\nand what to do"


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_every_error_can_be_caught_as_ours(cls: type[Exception]) -> None:
    """One `except RasteretError` catches everything that is raised on purpose."""
    assert issubclass(cls, RasteretError)


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_rebuilt_by_torch(cls: type[Exception]) -> None:
    """A DataLoader worker's error comes back as the same class with the message inside."""
    try:
        raise cls(MESSAGE)
    except Exception:
        wrapper = ExceptionWrapper(where="in DataLoader worker process 0")
    with pytest.raises(cls) as caught:
        wrapper.reraise()
    assert type(caught.value) is cls
    assert MESSAGE in str(caught.value)
    assert "worker process 0" in str(caught.value)


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_survives_pickling(cls: type[Exception]) -> None:
    """Class and message come back from a pickle."""
    copy = pickle.loads(pickle.dumps(cls(MESSAGE)))
    assert type(copy) is cls
    assert str(copy) == MESSAGE


@pytest.mark.parametrize(
    ("cls", "builtin"),
    [
        (errors.UsageError, ValueError),
        (errors.GeometryError, ValueError),
        (errors.UnknownBandError, ValueError),
        (errors.FetchError, OSError),
        (errors.FetchNotFoundError, OSError),
        (errors.NoOverlapError, IndexError),
    ],
)
def test_builtin_parents(cls: type[Exception], builtin: type[Exception]) -> None:
    """People who know only Python's own errors catch these too (TorchGeo's unions expect IndexError)."""
    assert issubclass(cls, builtin)


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("https://host/a.tif?sig=SECRET", "https://host/a.tif?…"),
        ("https://me:SECRET@host/a.tif", "https://…@host/a.tif"),
        ("GET https://me:SECRET@host/a.tif?sig=SECRET failed", "GET https://…@host/a.tif?… failed"),
        ("('https://host/a.tif?sig=SECRET')", "('https://host/a.tif?…')"),
        ("s3://bucket/key.tif?versionId=SECRET&x=1#frag", "s3://bucket/key.tif?…"),
        ("a https://h/1?t=SECRET b https://u:SECRET@h/2", "a https://h/1?… b https://…@h/2"),
        ("https://host/a@b.tif", "https://host/a@b.tif"),
        ("/data/why?.tif", "/data/why?.tif"),
        ("no address here", "no address here"),
        ("", ""),
    ],
)
def test_redact_examples(text: str, clean: str) -> None:
    """Query strings and user names go; everything else stays."""
    assert redact(text) == clean


def test_redact_removes_a_password_that_holds_an_at_sign() -> None:
    """The last @ before the path ends the user part (as `urlsplit` reads it); nothing before it may stay."""
    assert redact("https://me:PASS@WORD@host/a.tif") == "https://…@host/a.tif"


_SECRET = st.text("abcdefghijklmnopqrstuvwxyzABCDEF0123456789%+=&-_.~:", min_size=8, max_size=30).map("SECRET".__add__)


@examples(50)
@given(
    scheme=st.sampled_from(["https", "s3", "az", "abfss"]),
    secret=_SECRET,
    around=st.sampled_from(["%s", "x %s y", "<%s>"]),
)
def test_redact_lets_no_secret_through(scheme: str, secret: str, around: str) -> None:
    """Neither the query nor the user part shows a secret, whatever its characters."""
    for url in (
        f"{scheme}://host/a.tif?{secret}",
        f"{scheme}://{secret}@host/a.tif",
        f"{scheme}://u:{secret}@h/b?{secret}",
    ):
        clean = redact(around % url)
        assert "SECRET" not in clean
        assert redact(clean) == clean


@examples(50)
@given(text=st.text("ahtps:/?#@[]. \n'", max_size=30))
def test_redact_never_fails(text: str) -> None:
    """It runs while an error message is written, so no text may make it raise."""
    assert isinstance(redact(f"https://{text}"), str)
