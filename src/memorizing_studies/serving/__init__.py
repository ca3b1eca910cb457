"""An endpoint in the manner of OpenAI's, whose conversations have memories."""
