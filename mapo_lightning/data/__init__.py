"""Data: video files, the clips cut from them, and the replay of what an agent lived through."""
