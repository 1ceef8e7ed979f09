//! Vocabulary of the control plane: methods, parameters, errors.
