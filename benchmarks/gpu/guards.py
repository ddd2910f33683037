"""Seconds that a row of each part of the GPU benchmark may take: nothing is begun that would end
after the deadline.

A module of its own because both sides must agree and one of them imports no jax: the benchmark
leaves a row out when less is left, and a step of a slot (gpu_slot_steps.py) must be longer than the
guard of its last row. All are estimates.
"""

GUARDS = {
  "ceilings": 15,
  "dense_mode": 40,
  "lowerings": 25,
  "forms": 40,
  "lists": 25,
  "list_variants": 25,
  "tile_sizes": 15,
  "first_launches": 60,
  "launches": 60,
  "backward": 30,
  "window": 40,
  "freqformer": 40,
  "around": 30,
  "linear": 30,
  "search": 30,
  "torch": 60,
  "tokamax": 40,
  "rest": 40,
}
