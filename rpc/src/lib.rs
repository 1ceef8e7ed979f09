//! JSON-RPC 2.0 control plane: method table, server, client.
