"""Makes a token corpus from documents: reads them, encodes them in units, and merges the units in shuffled order."""
