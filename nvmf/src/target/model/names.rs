//! Names that hosts see: NQNs (Base 4.7) and the ASCII fields of Identify Controller (Base 5.1.13.2.1).

use uuid::Uuid;

use super::error::ModelError;

/// An NQN is at most this long, in bytes.
pub const MAX_NQN_BYTES: usize = 223;
/// Identify Controller SN, in bytes.
pub const MAX_SERIAL_BYTES: usize = 20;
/// Identify Controller MN, in bytes.
pub const MAX_MODEL_BYTES: usize = 40;

const UUID_PREFIX: &str = "nqn.2014-08.org.nvmexpress:uuid:";

/// Checks the form of an NQN: `nqn.YYYY-MM.reverse.domain:name`, or the UUID form.
///
/// # Errors
/// Says which part is wrong.
pub fn check_nqn(field: &'static str, nqn: &str) -> Result<(), ModelError> {
    let Err(reason) = nqn_form(nqn) else { return Ok(()) };
    let fix = "write nqn.YYYY-MM.reverse.domain:name (nqn.2026-11.io.example:vol0), or \
               nqn.2014-08.org.nvmexpress:uuid: followed by a UUID";
    Err(ModelError::invalid(field, nqn, reason, fix))
}

fn nqn_form(nqn: &str) -> Result<(), String> {
    if nqn.len() > MAX_NQN_BYTES {
        return Err(format!("{} bytes long, but an NQN has at most {MAX_NQN_BYTES}", nqn.len()));
    }
    if nqn.chars().any(char::is_control) {
        return Err("contains a control character".into());
    }
    if let Some(uuid) = nqn.strip_prefix(UUID_PREFIX) {
        // The library also knows forms without hyphens, with braces and as URN, which an NQN may not have.
        return match Uuid::parse_str(uuid) {
            Ok(_) if uuid.len() == 36 => Ok(()),
            _ => Err(format!("{uuid:?} is not a UUID of 8-4-4-4-12 hexadecimal digits")),
        };
    }
    let rest = nqn.strip_prefix("nqn.").ok_or("does not start with \"nqn.\"")?;
    let (date, rest) = rest.split_once('.').ok_or("has no domain after the date")?;
    let is_date = date.len() == 7
        && date.bytes().enumerate().all(|(at, byte)| if at == 4 { byte == b'-' } else { byte.is_ascii_digit() })
        && (1..=12).contains(&date[5..].parse::<u8>().unwrap_or(0));
    if !is_date {
        return Err(format!("{date:?} is not a date of the form YYYY-MM"));
    }
    let (domain, name) = rest.split_once(':').ok_or("has no ':' with a name after the domain")?;
    for label in domain.split('.') {
        let inner = label.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-');
        let ends = label.starts_with('-') || label.ends_with('-');
        if label.is_empty() || label.len() > 63 || !inner || ends {
            return Err(format!("{label:?} is not a label of a domain name"));
        }
    }
    if name.is_empty() {
        return Err("has no name after the ':'".into());
    }
    Ok(())
}

/// Checks a text field of Identify Controller: 1 to `max` printable ASCII characters.
///
/// # Errors
/// When it is not.
pub fn check_ascii(field: &'static str, text: &str, max: usize) -> Result<(), ModelError> {
    let fix = format!("give 1 to {max} printable ASCII characters");
    if text.is_empty() {
        return Err(ModelError::invalid(field, text, "empty", format!("{fix}, or leave it out")));
    }
    if text.len() > max {
        return Err(ModelError::invalid(field, text, format!("{} bytes long", text.len()), fix));
    }
    if let Some(odd) = text.chars().find(|c| !matches!(c, ' '..='~')) {
        return Err(ModelError::invalid(field, text, format!("contains {odd:?}"), fix));
    }
    Ok(())
}

/// The serial number of a subsystem that was given none: the same for the same NQN, different for different ones (64-bit
/// FNV-1a), so that hosts can tell controllers apart and a recreated subsystem keeps its own.
pub fn derived_serial(nqn: &str) -> String {
    let hash = nqn
        .bytes()
        .fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3));
    format!("RS{hash:016X}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::target::view::DISCOVERY_NQN;

    #[test]
    fn forms_of_the_specification_are_accepted() {
        for nqn in [
            "nqn.2024-01.io.example:vol1",
            "nqn.2016-06.io.spdk:cnode1",
            "nqn.2014-08.org.nvmexpress:uuid:4dadce4d-faac-4eb4-8ccf-8b8a6dba70bc",
            "nqn.2014-08.org.nvmexpress:UUID:anything",
            "nqn.2026-12.3com.a-b:x:y.z/é",
            "nqn.2026-11.localhost:x",
            &format!("nqn.2026-11.io.x:{}", "y".repeat(MAX_NQN_BYTES - 17)),
        ] {
            check_nqn("nqn", nqn).unwrap();
        }
    }

    #[test]
    fn other_forms_say_what_is_wrong() {
        let long = format!("nqn.2026-11.io.x:{}", "y".repeat(MAX_NQN_BYTES - 16));
        let label = format!("nqn.2026-11.{}:x", "l".repeat(64));
        for (nqn, reason) in [
            ("", "start with"),
            ("not-an-nqn", "start with"),
            ("NQN.2026-11.io:x", "start with"),
            ("nqn.", "no domain"),
            ("nqn.2026-11", "no domain"),
            ("nqn.2026-1.io.x:y", "\"2026-1\" is not a date"),
            ("nqn.2026-13.io.x:y", "not a date"),
            ("nqn.2026-00.io.x:y", "not a date"),
            ("nqn.2026-éa.io.x:y", "not a date"),
            ("nqn.20é6-11.io.x:y", "not a date"),
            ("nqn.2026+11.io.x:y", "not a date"),
            ("nqn.2026-11.io.x", "no ':'"),
            (DISCOVERY_NQN, "no ':'"),
            ("nqn.2026-11.io..x:y", "\"\" is not a label"),
            ("nqn.2026-11.-io:y", "not a label"),
            ("nqn.2026-11.io-:y", "not a label"),
            ("nqn.2026-11.i_o:y", "not a label"),
            ("nqn.2026-11.:y", "not a label"),
            (&label, "not a label"),
            ("nqn.2026-11.io.x:", "no name"),
            ("nqn.2026-11.io.x:a\0b", "control"),
            ("nqn.2014-08.org.nvmexpress:uuid:", "not a UUID"),
            ("nqn.2014-08.org.nvmexpress:uuid:4dadce4dfaac4eb48ccf8b8a6dba70bc", "not a UUID"),
            ("nqn.2014-08.org.nvmexpress:uuid:{4dadce4d-faac-4eb4-8ccf-8b8a6dba70bc}", "not a UUID"),
            (&long, "224 bytes long"),
        ] {
            let error = check_nqn("host", nqn).unwrap_err();
            assert!(error.reason.contains(reason), "{nqn}: {error}");
            assert_eq!((error.field, error.value.as_str()), ("host", Some(nqn)));
        }
    }

    #[test]
    fn text_fields_are_printable_ascii() {
        check_ascii("serial_number", &"S".repeat(20), 20).unwrap();
        check_ascii("model_number", "a ~!", 40).unwrap();
        for (text, reason) in [("", "empty"), (&*"S".repeat(21), "21 bytes"), ("é", "'é'"), ("a\tb", "'\\t'")] {
            let error = check_ascii("serial_number", text, 20).unwrap_err();
            assert!(error.reason.contains(reason), "{text}: {error}");
        }
    }

    #[test]
    fn derived_serials_differ_and_fit() {
        let (a, b) = (derived_serial("nqn.2026-11.io.x:a"), derived_serial("nqn.2026-11.io.x:b"));
        assert_ne!(a, b);
        assert_eq!(a, derived_serial("nqn.2026-11.io.x:a"));
        check_ascii("serial_number", &a, MAX_SERIAL_BYTES).unwrap();
    }
}
