"""Where FlowGraph meets the files and the trainers of others. Each module is imported by who needs it, and nothing here is."""
