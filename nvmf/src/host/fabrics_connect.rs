//! The Connect command's data, and what its failure means (Base 6.3).

use super::Error;
use crate::spec::fabrics::{CONNECT_DATA_BYTES, ConnectData, ConnectResult, InvalidParameter};
use crate::spec::{Cqe, Status, fill_text};
use reactor::Buffers;
use zerocopy::little_endian::U16;
use zerocopy::{FromZeros, IntoBytes};

/// The data of a Connect.
pub(super) fn data(subnqn: &str, hostnqn: &str, hostid: [u8; 16], cntlid: u16) -> Buffers {
    let mut connect = ConnectData::new_zeroed();
    connect.hostid = hostid;
    connect.cntlid = U16::new(cntlid);
    fill_text(&mut connect.subnqn, subnqn, 0);
    fill_text(&mut connect.hostnqn, hostnqn, 0);
    let mut data = Buffers::heap(CONNECT_DATA_BYTES as usize);
    data.write_at(0, connect.as_bytes());
    data
}

/// The controller that a Connect ended in.
pub(super) fn check(what: &'static str, cqe: &Cqe) -> Result<u16, Error> {
    let (status, result) = (cqe.status(), cqe.dw0.get());
    if !status.is_success() {
        return Err(Error::Refused { what, status, hint: hint(status, result) });
    }
    let answer = ConnectResult(result);
    if answer.atr() != 0 || answer.ascr() != 0 {
        let status = Status::AUTHENTICATION_REQUIRED;
        return Err(Error::Refused { what, status, hint: "this host has no key for that subsystem" });
    }
    Ok(answer.cntlid() as u16)
}

fn hint(status: Status, dw0: u32) -> &'static str {
    if status.same_code(Status::CONNECT_INVALID_HOST) {
        return "the subsystem does not allow this host: add its NQN there, or connect as a host that is allowed";
    }
    if status.same_code(Status::CONNECT_CONTROLLER_BUSY) {
        return "the subsystem has no controller to spare now: try again";
    }
    if status.same_code(Status::CONNECT_INVALID_PARAMETERS) {
        return match InvalidParameter::from_dw0(dw0) {
            InvalidParameter::SUBNQN => "there is no such subsystem at that address: look for it with discover",
            InvalidParameter::HOSTNQN => "the host's NQN is not one",
            InvalidParameter::HOSTID => "the host identifier is not one, or of another host",
            InvalidParameter::CNTLID => "the controller is gone",
            InvalidParameter::QID => "the queue exists already, or is one too many",
            InvalidParameter::SQSIZE => "the queue is too long: ask for fewer commands at once",
            InvalidParameter::KATO => "the keep-alive timeout is not taken",
            _ => "a parameter of Connect is not taken",
        };
    }
    ""
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refusals_say_what_to_do() {
        let refused =
            |status: Status, dw0| check("Connect", &Cqe::new(0, status).with_dw0(dw0)).unwrap_err().to_string();
        let unknown = refused(Status::CONNECT_INVALID_PARAMETERS.dnr(), InvalidParameter::SUBNQN.dw0());
        assert_eq!(
            unknown,
            "Connect: Connect Invalid Parameters: there is no such subsystem at that address: look for it with discover"
        );
        assert!(refused(Status::CONNECT_INVALID_HOST.dnr(), 0).contains("does not allow this host"));
        assert_eq!(refused(Status::INTERNAL_ERROR, 0), "Connect: Internal Error");
        assert_eq!(check("Connect", &Cqe::success(0).with_dw0(7)), Ok(7));
        assert!(check("Connect", &Cqe::success(0).with_dw0(7 | 1 << 16)).is_err());
    }
}
