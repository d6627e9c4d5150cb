"""How documents become a token corpus: read, encoded unit by unit, merged in shuffled order."""
