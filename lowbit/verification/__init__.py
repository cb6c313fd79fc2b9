"""What a finished folder says of itself, checked by what reads folders: nothing here knows how one is written."""
