//! How the data of a command moves: which way, and in which pieces.

use super::*;

/// What to do about the data of a command.
pub(super) fn plan(sqe: &Sqe, data: Result<DataAt, Status>) -> Result<(Plan, Blocks, Option<u32>), Status> {
    let none = Ok((Plan::None, Blocks::new(), None));
    let to_host = match Direction::of_command(sqe) {
        Direction::None | Direction::Bidirectional => {
            // Whatever descriptor such a command has names nothing that moves; a key may have to be invalidated all the same.
            return match data {
                Ok(DataAt::Capsule { .. }) => Err(Status::INVALID_FIELD.dnr()),
                Ok(DataAt::Host { invalidate, .. }) => Ok((Plan::None, Blocks::new(), invalidate)),
                _ => none,
            };
        }
        Direction::HostToController => false,
        Direction::ControllerToHost => true,
    };
    let data = data?;
    if data == DataAt::Nowhere {
        return none;
    }
    // PRPs, and metadata SGLs without data SGLs, do not exist on message-based transports (Base 4.3).
    if sqe.opcode != opcode::FABRICS && !matches!(sqe.psdt(), 1 | 2) {
        return Err(Status::INVALID_FIELD.dnr());
    }
    match data {
        DataAt::Host { blocks, len, invalidate } => {
            let plan = if to_host { Plan::ToHost { len } } else { Plan::FromHost { len } };
            Ok((plan, blocks, invalidate))
        }
        DataAt::Capsule { start, len } if !to_host => Ok((Plan::InCapsule { start, len }, Blocks::new(), None)),
        DataAt::Capsule { .. } | DataAt::Nowhere => Err(Status::SGL_TYPE_INVALID.dnr()),
    }
}

/// The cursor behind `at` bytes.
pub(super) fn rewound(blocks: &Blocks, at: u32) -> Cursor {
    let (mut block, mut in_block) = (0, at);
    while blocks.get(block).is_some_and(|b| in_block >= b.len) {
        in_block -= blocks[block].len;
        block += 1;
    }
    Cursor { block, in_block, at }
}

/// At most `limit` transfers from the cursor on, which moves behind them: each lies in one block of the host's memory and in
/// at most `pieces` segments of the data, of which `len` bytes are moved in all.
pub(super) fn transfers(
    data: &Buffers,
    blocks: &Blocks,
    len: u32,
    cursor: &mut Cursor,
    limit: u32,
    pieces: u32,
    operation: impl Fn(u64, u32) -> Operation,
) -> SmallVec<[Transfer; 4]> {
    let mut out = SmallVec::new();
    while cursor.at < len && (out.len() as u32) < limit {
        let block = blocks[cursor.block];
        let most = (block.len - cursor.in_block).min(len - cursor.at);
        let mut bytes = 0;
        for _ in 0..pieces {
            let segment = data.slice_at((cursor.at + bytes) as usize).len() as u32;
            bytes = (bytes + segment).min(most);
            if bytes == most || segment == 0 {
                break;
            }
        }
        assert!(bytes > 0, "data is as long as what is moved of it");
        let address = block.address.wrapping_add(cursor.in_block.into());
        out.push(Transfer { operation: operation(address, block.key), bytes });
        cursor.at += bytes;
        cursor.in_block += bytes;
        if cursor.in_block == block.len {
            *cursor = Cursor { block: cursor.block + 1, in_block: 0, at: cursor.at };
        }
    }
    out
}
