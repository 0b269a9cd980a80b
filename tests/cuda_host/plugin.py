"""Lets backend "cuda" run on CPU tensors through the host harness, for a whole run of pytest:

pytest -p tests.cuda_host.plugin tests/test_op_contract.py -k cuda
"""

from __future__ import annotations

from tests.cuda_host import host

HOSTS = host.as_backend()
