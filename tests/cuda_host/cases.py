"""Sizes at which the kernels of csrc/cuda change their ways: both sides of every tile."""

from __future__ import annotations

from tests.cases import CASES, dynamic_routing, predict_votes, squash

TILES = (
    # A row is one pack of 16 bytes, or of 1 number; 2 … 32 lanes; more than 32 lanes hold.
    *(squash(f"row-{size}", 5, size) for size in (2, 4, 8, 9, 16, 31, 32, 33, 64, 65, 128, 129, 132, 256, 264)),
    # One block and a little more: 256 threads of a row each, and of a column each.
    squash("rows-255", 255, 1),
    squash("rows-257", 257, 1),
    squash("rows-65", 65, 16),
    squash("columns-256", 2, 3, 128, dim=1),
    squash("columns-257", 3, 257, dim=0),
    # Samples of a tile: 2 or 16 in forward, 4 or 8 in backward. Columns: 32 lanes of a pack, packs of 16 bytes or not.
    *(predict_votes(f"batch-{b}", b, 3, 2, 3, 4) for b in (2, 3, 5, 8, 9, 16, 17)),
    *(predict_votes(f"columns-{j}x{e}", 3, 4, j, 2, e) for j, e in ((2, 8), (9, 16), (5, 7), (33, 8))),
    # Dimensions of a slice: 8.
    *(predict_votes(f"dims-{d}", 3, 5, 2, d, 4) for d in (7, 8, 9, 17)),
    # Both gradients at once: 16 … 256 packs, 8 dimensions, rows of a chunk and 4 at a time.
    *(predict_votes(f"together-{b}x{j}x{d}", b, 3, j, d, 1) for b, j, d in ((3, 15, 2), (4, 16, 8), (5, 17, 9))),
    *(predict_votes(f"together-{j}", 2, 2, j, 2, 1) for j in (256, 257)),
    predict_votes("together-rows", 5, 26, 10, 8, 16, positions=13),
    # Rows of a chunk of grad_weight: 32.
    *(predict_votes(f"rows-{b * p}", b, 2 * p, 1, 2, 4, positions=p) for b, p in ((4, 8), (3, 11), (5, 13))),
    predict_votes("rows-1025", 25, 41, 1, 1, 1, positions=41),
    # Lower capsules of a tile where shared memory holds their coefficients: 32. Packs of 132 numbers no warp holds.
    *(dynamic_routing(f"children-{i}", 2, i, 2, 132, bias=True) for i in (31, 32, 33, 65)),
    dynamic_routing("shared-leaky", 2, 4, 2, 132, leaky=True),
    dynamic_routing("shared-last", 2, 4, 2, 132, routing_grad="last"),
    # Lower capsules whose votes registers hold: 2 or 4 at a time, 4 and 1 a chunk at least. Packs of a lane in float32:
    # 5 on 8 and on 32 lanes, 8 on 32, of 4 numbers; in 16 bits 3 on 8 and 4 on 32, of 8; in float64 5 on 16, of 2.
    *(dynamic_routing(f"held-{i}", 2, i, 3, 8, bias=True) for i in (3, 4, 5, 8, 9)),
    dynamic_routing("held-chunks", 1, 261, 3, 8, bias=True),
    *(dynamic_routing(f"held-{j}x{e}", 2, 5, j, e, leaky=True) for j, e in ((10, 16), (11, 16), (12, 16), (13, 16))),
    *(
        dynamic_routing(f"held-{j}x{e}", 2, 3, j, e)
        for j, e in ((40, 16), (41, 16), (64, 16), (65, 16), (2, 128), (1, 256))
    ),
    # Lanes of a vote, packs of 16 bytes or not; numbers of a higher capsule: 32 lanes.
    *(dynamic_routing(f"numbers-{e}", 2, 5, 3, e, bias=True) for e in (8, 16, 31, 33, 132)),
    # Higher capsules: 32 lanes in the softmax, 8 warps in the finish; columns: 256 threads.
    *(dynamic_routing(f"parents-{j}", 2, 4, j, e, leaky=True) for j, e in ((9, 1), (33, 2), (59, 16), (257, 1))),
    # Tiles of fewer capsules, and coefficients that do not fit shared memory.
    dynamic_routing("parents-300", 1, 9, 300, 1, iterations=2),
    dynamic_routing("parents-4100", 1, 9, 4100, 1, bias=True, iterations=2),
)
HOST_CASES = (*CASES, *TILES)
