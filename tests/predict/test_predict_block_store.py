"""The store against a dictionary, killed at any time."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from property_settings import examples

from rasteret_ml.predict.block_store import BlockStore

LAYOUT = ((2, 4, 4), "float32"), ((4, 4), "int64")
BYTES = 2 * 16 * 4 + 16 * 8


steps = st.lists(
    st.one_of(
        st.tuples(st.just("modify"), st.integers(0, 9)),
        st.tuples(st.just("pop"), st.integers(0, 9)),
        st.tuples(st.sampled_from(["save", "flush", "kill"]), st.none()),
    ),
    max_size=80,
)


@examples(150)
@given(steps, st.integers(1, 4))
def test_the_store_is_a_dictionary_and_a_kill_goes_back_to_what_was_saved(taken, room):
    """Whatever was written, flushed, dropped or put in free slots since."""
    with tempfile.TemporaryDirectory() as folder:
        path, index = Path(folder) / "blocks", {}
        store = BlockStore(path, LAYOUT, room * BYTES, index)
        held, saved = {}, {}
        for count, (name, number) in enumerate(taken, start=1):
            if name == "modify":
                values, keys = store.modify(number)
                np.testing.assert_array_equal(keys, held.get(number, 0))
                values[:], keys[:] = -count, count
                held[number] = count
            elif name == "pop":
                block = store.pop(number)
                assert (block is None) == (number not in held)
                if block is not None:
                    assert (block[1] == held.pop(number)).all()
            elif name == "save":
                index = store.flush()
                store.commit()
                saved = dict(held)
            elif name == "flush":
                store.flush()  # killed before it was kept
            else:
                store.close()
                store = BlockStore(path, LAYOUT, room * BYTES, index)
                held = dict(saved)
        for number in range(10):
            block = store.pop(number)
            assert (block is None) == (number not in held)
            if block is not None:
                assert (block[1] == held[number]).all()
                assert (block[0] == -held[number]).all()
        store.close()


def test_slots_are_used_again(tmp_path):
    """A file grows with the blocks that are in use, not with those that were."""
    path = tmp_path / "blocks"
    store = BlockStore(path, LAYOUT, BYTES, {})
    for number in range(200):
        store.modify(number)
        store.modify(number + 1)
        store.pop(number)
        store.flush()
        store.commit()
    store.close()
    assert path.stat().st_size <= 6 * BYTES
