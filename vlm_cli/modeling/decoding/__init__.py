"""How a VLM writes an answer: tokens are chosen on the device, and the host looks at them every few tokens."""
