"""What tests of several folders share: a ledger in few words, stand-ins, servers, jobs, clusters."""
