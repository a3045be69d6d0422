"""The cache with room behaves as the library's own, and does not copy what it holds for every token."""

import weakref

import torch
from tiny import VOCAB, tiny_llama
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from redistill.cache import ROOM, RoomyLayer, make_room


def filled(rows=3, length=5):
    layer, generator = DynamicLayer(), torch.Generator().manual_seed(length)
    layer.update(*torch.rand(2, rows, 2, length, 4, generator=generator))
    return layer


def test_it_holds_what_the_librarys_layer_holds_whatever_is_done_to_both():
    plain, roomy = filled(), RoomyLayer(filled())
    generator = torch.Generator().manual_seed(1)
    order = torch.tensor([2, 0, 0, 1])
    doings = [
        None,
        None,
        -3,
        None,
        order,
        None,
        None,
        order[:2],
        -1,
        None,
        *[None] * (ROOM + 9),
        order[1:2] * 0,
        None,
    ]
    for number, doing in enumerate(doings):
        for layer in (plain, roomy):
            if isinstance(doing, int):
                layer.crop(doing)
            elif doing is not None:
                layer.reorder_cache(doing)
        if doing is None:
            new = torch.rand(2, len(plain.keys), 2, 1 + number % 2, 4, generator=generator)
            returned = [layer.update(*new) for layer in (plain, roomy)]
            assert all(one.equal(other) for one, other in zip(*returned, strict=True))
        assert plain.get_seq_length() == roomy.get_seq_length() and plain.keys.equal(roomy.keys)
        assert plain.values.equal(roomy.values)


def test_tokens_are_written_into_the_room_and_nothing_is_moved():
    layer = RoomyLayer(filled())
    layer.update(*torch.rand(2, 3, 2, 1, 4))
    at = layer.keys.data_ptr(), layer.values.data_ptr()
    for _ in range(ROOM):
        layer.update(*torch.rand(2, 3, 2, 1, 4))
        assert (layer.keys.data_ptr(), layer.values.data_ptr()) == at
    layer.update(*torch.rand(2, 3, 2, 1, 4))
    assert layer.keys.data_ptr() != at[0]


def test_only_layers_that_hold_something_and_every_token_are_exchanged():
    cache = tiny_llama(VOCAB, layers=2)(input_ids=torch.arange(6)[None], use_cache=True).past_key_values
    make_room(cache)
    assert [type(layer) for layer in cache.layers] == [RoomyLayer] * 2
    before = cache.layers[0]
    make_room(cache)
    assert cache.layers[0] is before
    empty = DynamicCache()
    make_room(empty)
    assert not any(isinstance(layer, RoomyLayer) for layer in empty.layers)


def test_rows_that_leave_leave_no_room_behind():
    layer = RoomyLayer(filled())
    layer.update(*torch.rand(2, 3, 2, 1, 4))
    room = weakref.ref(layer.keys.untyped_storage())
    layer.reorder_cache(torch.tensor([0, 2]))
    assert room() is None
