"""What a module built by Emscripten imports, with Emscripten's behaviour, in Python."""
