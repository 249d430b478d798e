"""How many threads torch computes with in a thread of a pool."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import torch

_changing_threads = threading.Lock()


def use_threads(count: int) -> None:
    """The calling thread, one of a pool, computes with that many from here on.

    ``torch.set_num_threads`` sets what the calling thread uses and what later threads start with; a thread that ends at
    once puts the latter back, so that neither other threads nor another pool ever start with them. Before, the calling
    thread asks: the first to be asked, or to compute, would otherwise take the latter.
    """
    torch.get_num_threads()
    with _changing_threads:
        with ThreadPoolExecutor(1) as fresh:
            threads = fresh.submit(torch.get_num_threads).result()
        torch.set_num_threads(count)
        restore = threading.Thread(target=torch.set_num_threads, args=(threads,))
        restore.start()
        restore.join()
