"""Lightning hooks that call the library; no algorithm lives here."""
