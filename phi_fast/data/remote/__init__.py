"""A bounded local cache of remote token files, whose blocks are fetched ahead of their use."""
