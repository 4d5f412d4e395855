//! The only file that knows every part: backend → runner → engine → text → chat → server.
