"""Where a run's corpora lie: in folders, or at URLs, of which a cache on this machine holds what is read."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from ..data import DataCache, remote_corpus
from ..data.remote.origin import url_of
from .options import Options, named_places


class CorpusPlaces(NamedTuple):
    """The corpora of a run's mixture."""

    paths: dict[str, Path]
    """Folder of each, by name; of a remote corpus its folder in the cache."""
    cache: DataCache | None
    """The cache of the remote ones; None if there are none."""

    @staticmethod
    def of(options: Options) -> CorpusPlaces:
        """Raises UsageError for a remote corpus that is not there, and for a cache that cannot be used."""
        given = named_places(options.corpora)
        places = {name: given.get(name, options.data / name) for name in options.mixture}
        urls = {name: url for name, place in places.items() if (url := url_of(place)) is not None}
        if not urls:
            return CorpusPlaces(places, None)
        default = DataCache.default_folder()
        cache = DataCache(options.data_cache or default, options.data_cache_gb or DataCache.default_gigabytes())
        return CorpusPlaces({**places, **{name: remote_corpus(url, cache) for name, url in urls.items()}}, cache)
