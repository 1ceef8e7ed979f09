//! Private data of the RDMA connection manager: what host and controller say when a queue pair is set up (NVMe RDMA Transport
//! Specification 1.1, section 3.2, cited as "RDMA").
//!
//! ```text
//! request, 32 bytes:   0 RECFMT, 2 QID, 4 HRQSIZE, 6 HSQSIZE (0's based), 8 CNTLID, rest reserved
//! accept, 32 bytes:    0 RECFMT, 2 CRQSIZE, rest reserved
//! reject, 4 bytes:     0 RECFMT, 2 STS
//! ```
//!
//! A connection manager may pad what it hands up with zeroes, so more bytes than these are no fault; fewer are.

use zerocopy::little_endian::U16;
use zerocopy::{FromBytes, FromZeros};

/// The only record format there is.
pub const RECFMT: u16 = 0;

wire! {
    /// RDMA_CM_REQUEST private data, as it lies on the wire.
    pub struct RequestData: 32 {
        /// 0: record format.
        pub recfmt: U16,
        /// 2: queue identifier; 0 is the admin queue.
        pub qid: U16,
        /// 4: entries of the host's receive queue.
        pub hrqsize: U16,
        /// 6: entries of the host's send queue, 0's based.
        pub hsqsize: U16,
        /// 8: controller that an I/O queue is for, of hosts that say so; 0 of others.
        pub cntlid: U16,
        /// 10: reserved
        pub rsvd: [u8; 22],
    }
}

wire! {
    /// RDMA_CM_ACCEPT private data.
    pub struct AcceptData: 32 {
        /// 0: record format.
        pub recfmt: U16,
        /// 2: entries of the controller's receive queue.
        pub crqsize: U16,
        /// 4: reserved
        pub rsvd: [u8; 28],
    }
}

wire! {
    /// RDMA_CM_REJECT private data.
    pub struct RejectData: 4 {
        /// 0: record format.
        pub recfmt: U16,
        /// 2: why; see [`Reject`].
        pub sts: U16,
    }
}

/// Why a controller refuses a connection (RDMA 3.2.4).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
pub enum Reject {
    /// The private data is too short.
    PrivateDataLength = 1,
    /// The record format is unknown.
    Recfmt = 2,
    /// There is no such queue.
    Qid = 3,
    /// The host's send queue is too small or too large.
    Hsqsize = 4,
    /// The host's receive queue is too small.
    Hrqsize = 5,
    /// The controller has nothing left for another queue pair.
    Resources = 6,
    /// The inbound read depth is not supported.
    Ird = 7,
    /// The outbound read depth is not supported.
    Ord = 8,
}

impl Reject {
    /// All of them.
    pub const ALL: [Reject; 8] = [
        Reject::PrivateDataLength,
        Reject::Recfmt,
        Reject::Qid,
        Reject::Hsqsize,
        Reject::Hrqsize,
        Reject::Resources,
        Reject::Ird,
        Reject::Ord,
    ];

    /// Private data that says so.
    pub fn data(self) -> RejectData {
        RejectData { recfmt: U16::new(RECFMT), sts: U16::new(self as u16) }
    }

    /// What private data of a reject says; `None` if it is not of this protocol.
    pub fn parse(bytes: &[u8]) -> Option<Reject> {
        let (data, _) = RejectData::read_from_prefix(bytes).ok()?;
        let known = Reject::ALL.into_iter().find(|reject| *reject as u16 == data.sts.get());
        known.filter(|_| data.recfmt.get() == RECFMT)
    }

    /// In words, for whoever was refused.
    pub fn text(self) -> &'static str {
        match self {
            Reject::PrivateDataLength => "the private data is too short",
            Reject::Recfmt => "the record format is unknown",
            Reject::Qid => "there is no such queue",
            Reject::Hsqsize => "the send queue's size is not supported",
            Reject::Hrqsize => "the receive queue is smaller than the send queue",
            Reject::Resources => "the controller has no resources left",
            Reject::Ird => "the inbound read depth is not supported",
            Reject::Ord => "the outbound read depth is not supported",
        }
    }
}

/// A host's request, with counts instead of 0's based fields.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ConnectRequest {
    /// Queue identifier; 0 is the admin queue.
    pub qid: u16,
    /// Commands that the host has outstanding at once, at most.
    pub send_entries: u32,
    /// Responses that it has receives posted for.
    pub receive_entries: u32,
    /// Controller that an I/O queue is for, if the host says so.
    pub cntlid: Option<u16>,
}

impl ConnectRequest {
    /// Reads a request that may be padded.
    ///
    /// # Errors
    /// The reject that the host is due.
    pub fn parse(bytes: &[u8]) -> Result<ConnectRequest, Reject> {
        let (data, _) = RequestData::read_from_prefix(bytes).map_err(|_| Reject::PrivateDataLength)?;
        if data.recfmt.get() != RECFMT {
            return Err(Reject::Recfmt);
        }
        let request = ConnectRequest {
            qid: data.qid.get(),
            send_entries: u32::from(data.hsqsize.get()) + 1,
            receive_entries: data.hrqsize.get().into(),
            cntlid: (data.qid.get() != 0 && data.cntlid.get() != 0).then_some(data.cntlid.get()),
        };
        // A queue has two entries at least (Base 3.3.3.1), and each command has one response.
        if request.send_entries < 2 {
            return Err(Reject::Hsqsize);
        }
        // What hosts in the field send: a receive queue as large as the 0's based field of the send queue says.
        if request.receive_entries + 1 < request.send_entries {
            return Err(Reject::Hrqsize);
        }
        Ok(request)
    }

    /// The private data that says so.
    ///
    /// # Panics
    /// If a count does not fit.
    pub fn data(&self) -> RequestData {
        let fits = |count: u32| U16::new(u16::try_from(count).expect("a queue's size fits"));
        RequestData {
            recfmt: U16::new(RECFMT),
            qid: U16::new(self.qid),
            hrqsize: fits(self.receive_entries),
            hsqsize: fits(self.send_entries - 1),
            cntlid: U16::new(self.cntlid.unwrap_or(0)),
            rsvd: [0; 22],
        }
    }
}

impl AcceptData {
    /// The controller has this many receives for the host's commands.
    pub fn new(receive_entries: u16) -> AcceptData {
        AcceptData { crqsize: U16::new(receive_entries), ..AcceptData::new_zeroed() }
    }

    /// Reads an accept that may be padded; the controller's receives. `None` if it is not of this protocol.
    pub fn parse(bytes: &[u8]) -> Option<u16> {
        let (data, _) = AcceptData::read_from_prefix(bytes).ok()?;
        (data.recfmt.get() == RECFMT).then_some(data.crqsize.get())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use zerocopy::IntoBytes;

    const REQUEST: ConnectRequest = ConnectRequest { qid: 3, send_entries: 128, receive_entries: 128, cntlid: Some(7) };

    #[test]
    fn a_request_is_these_bytes() {
        let data = REQUEST.data();
        assert_eq!(&data.as_bytes()[..10], [0, 0, 3, 0, 128, 0, 127, 0, 7, 0]);
        assert_eq!(ConnectRequest::parse(data.as_bytes()), Ok(REQUEST));
        let padded = [data.as_bytes(), &[0; 24]].concat();
        assert_eq!(ConnectRequest::parse(&padded), Ok(REQUEST));
    }

    #[test]
    fn what_is_wrong_with_a_request_is_told() {
        assert_eq!(ConnectRequest::parse(&REQUEST.data().as_bytes()[..31]), Err(Reject::PrivateDataLength));
        assert_eq!(ConnectRequest::parse(&[]), Err(Reject::PrivateDataLength));
        let with = |at: usize, value: u16| {
            let mut data = REQUEST.data();
            data.as_mut_bytes()[at..at + 2].copy_from_slice(&value.to_le_bytes());
            ConnectRequest::parse(data.as_bytes())
        };
        assert_eq!(with(0, 1), Err(Reject::Recfmt));
        assert_eq!(with(6, 0), Err(Reject::Hsqsize));
        assert_eq!(with(4, 126), Err(Reject::Hrqsize));
        assert_eq!(with(4, 127).map(|request| request.receive_entries), Ok(127));
        assert_eq!(with(6, 0xffff), Err(Reject::Hrqsize));
        // The admin queue belongs to no controller yet.
        assert_eq!(with(2, 0).map(|request| request.cntlid), Ok(None));
    }

    #[test]
    fn all_rejects_survive_the_wire() {
        for reject in Reject::ALL {
            assert_eq!(Reject::parse(reject.data().as_bytes()), Some(reject));
            assert!(!reject.text().is_empty());
        }
        assert_eq!(Reject::Qid.data().as_bytes(), [0, 0, 3, 0]);
        for bytes in [&[][..], &[0, 0, 3], &[1, 0, 3, 0], &[0, 0, 0, 0], &[0, 0, 9, 0]] {
            assert_eq!(Reject::parse(bytes), None);
        }
    }

    #[test]
    fn an_accept_tells_the_controllers_receives() {
        let data = AcceptData::new(128);
        assert_eq!(&data.as_bytes()[..4], [0, 0, 128, 0]);
        assert_eq!(AcceptData::parse(&[data.as_bytes(), &[0; 164]].concat()), Some(128));
        assert_eq!(AcceptData::parse(&data.as_bytes()[..31]), None);
    }
}
