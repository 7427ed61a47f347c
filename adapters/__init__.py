"""Where FlowGraph meets the files and the trainers of others. Import its modules one by one."""
