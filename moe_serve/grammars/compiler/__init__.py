"""What runs in the processes that compile and follow grammars. Imports no torch and no numpy."""
