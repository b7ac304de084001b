"""Chat templates: how a conversation is written as text, within limits on time, memory and output."""
