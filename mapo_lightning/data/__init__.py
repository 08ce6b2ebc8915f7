"""Data: video files, the clips cut from them, and the replay of an agent's experience."""
